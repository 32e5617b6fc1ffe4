"""What a trainer needs to train on an export: one module and one page a trainer. Import the one you use.

Every module here imports its trainer and `pear_data.loss`, and nothing else of pear_data.
"""
