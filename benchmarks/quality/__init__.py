"""Parts of benchmarks/quality.py: what is judged (encoder, decoder), the peers, and the tables."""
