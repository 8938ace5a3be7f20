"""Models of many kinds, with and without the connector: a table for people, a few rows for CI."""
