"""What each engine costs and gives, for every backbone: measured, and laid out as a page."""
