"""SOUL.md and seeds to datasets: teachers, journal, recipes, tool rollouts, export."""
