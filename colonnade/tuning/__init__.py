"""What fits in memory and how long a step takes: measured (micro-batch autotuner) or computed (cost model, plans)."""
