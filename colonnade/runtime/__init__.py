"""What the processes of a command do beside computing: start, exit, agree on errors and stops, notice dead peers."""
