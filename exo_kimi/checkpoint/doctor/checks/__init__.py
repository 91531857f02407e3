"""Checks of the doctor, one module for each kind of file; each collects every finding and raises none."""
