"""The program: arguments in, tables and pages out."""
