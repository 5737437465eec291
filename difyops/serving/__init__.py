"""The built-in model server: llama.cpp for chat, ONNX Runtime for embeddings, one `/v1`."""
