"""What a run reports about itself: metric rows, plots and on-screen progress."""
