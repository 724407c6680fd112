"""Tables of quality: preparations and trainings of many rows, and what is shown of them."""
