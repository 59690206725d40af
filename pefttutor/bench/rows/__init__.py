"""The rows of the table, one file for each piece of work; every file defines `ROWS`, a list of `Row`."""
