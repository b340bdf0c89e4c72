"""`g2rpo evaluate`: a checkpoint, or a folder of images, past all rewards."""
