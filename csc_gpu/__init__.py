"""Backdoor defense for image classifiers: Cluster Segregation Concealment and its rivals.

The command line is `csc-gpu`; the method is in `csc_gpu.csc`, where a reader starts.
"""
