"""What the doctor looks at: one kind of file to a module; each collects every finding and raises none."""
