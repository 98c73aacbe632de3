"""Secure aggregation: the coordinator learns the sum over a cohort of sites, and nothing else.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS 2017), in
the form that stands a malicious coordinator; above some two hundred sites on a sparse graph, after Bell
et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead" (CCS 2020). Pure state
machines: nothing here reads, writes or sends. docs/secure-aggregation.md has the protocol in words.
"""
