"""Autoregressive networks, the twins beside which a masked-diffusion one is measured, and judges: their exact likelihoods, and what
they write from left to right. Training them is the objective's business, `kind="autoregressive"`.

May import what llada.evals may, and no other room of it.
"""
