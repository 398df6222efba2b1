"""The MINT platform's library: stages that turn references into references, and the plug-ins they load."""

__version__ = "0.1.0"
