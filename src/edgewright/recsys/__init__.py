"""Recommendation: models of clicks made of embedding tables and small networks, their data, baselines and figures."""
