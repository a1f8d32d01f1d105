"""What fits and how long it takes: tried (the micro-batch autotuner) or computed (the cost model and plans)."""
