"""The guides' benchmark: people talk with a served model, in several rounds over a long text."""
