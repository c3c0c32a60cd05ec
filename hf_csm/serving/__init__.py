"""Conversations over the network, and offline, with Moshi and its adapters."""
