"""Why layers collapse: how alike their parameters and hidden states are, and what each one's loss would cost.

Pure functions; imports neither Lightning nor the command line. This file stays free of torch, so that help is fast.
"""
