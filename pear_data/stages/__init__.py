"""The stages of a job, one function each: ingest, score, weight, then look, export and verify."""
