"""Directories with a file for each storage: what lies where, and how they are written."""
