"""The tools' real execution: Read, Edit, Grep, Bash inside one directory."""
