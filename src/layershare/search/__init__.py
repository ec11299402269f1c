"""Search a plan for a budget by the measured change of the answer: spaces, trials, and the verb (through optuna)."""
