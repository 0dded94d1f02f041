"""Measuring: `run` scores answers over a file of questions, `bench` times the engine. The spine never imports this."""
