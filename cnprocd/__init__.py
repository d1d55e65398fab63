"""cnprocd: act on the death and birth of Linux processes. See cnprocd/README.md for the map."""

__version__ = "0.1.0"
