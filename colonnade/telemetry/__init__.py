"""What a run tells about itself: metric rows, plots and the progress on screen."""
