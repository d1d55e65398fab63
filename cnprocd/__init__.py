"""cnprocd: act on the death and birth of Linux processes. The map is docs/architecture.md."""

__version__ = "0.2.0"
