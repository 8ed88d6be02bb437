"""Lists of videos in every form that is accepted."""
