"""The mathematics: noise schedules, the forward process, the loss, and likelihood estimates. Pure functions."""
