"""Publishers' data sets: one module each, and what reading their files shares."""
