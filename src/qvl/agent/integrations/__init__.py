"""Integrations of qvl into LangChain and MCP."""
