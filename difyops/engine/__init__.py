"""The native model server: constant-memory models behind an OpenAI-compatible `/v1`.

Reading order: request, scheduler, runner, state, mixers/base. Nothing here is imported by the CLI
before a model is served: torch takes seconds to load.
"""
