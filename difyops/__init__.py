"""difyops: from a bare machine to a self-hosted Dify that answers from your own model."""

__version__ = "0.1.0"
