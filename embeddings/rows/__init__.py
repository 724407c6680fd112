"""What is known of the rows of tables: their initial values, and which of them training has changed."""
