"""Which part of an image each visual token shows: arithmetic, no model."""
