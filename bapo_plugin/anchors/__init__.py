"""Base responses made by the reference model, for rows that lack one.

generate.py     which prompts need a response, and the run that makes them
engines.py      how: transformers on this machine
server.py       how: an OpenAI-compatible server
provenance.py   what a response depends on, so that none is used for another model or setting
"""
