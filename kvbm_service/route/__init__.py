"""One HTTP front for several engines: a prompt goes where its prefix is, or where there is room."""
