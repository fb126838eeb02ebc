"""Files that are safe to read and to write, and what is shown or seeded from their contents."""
