"""From ordered events to stored samples: cut, counted, ordered in time and written."""
