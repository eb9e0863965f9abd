"""Engines that serve exported models: started on a directory, asked as their users ask them, and ended."""
