"""What people look at: facts as data, tables, progress."""
