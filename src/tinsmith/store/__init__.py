"""What survives in SQL. Every statement of Tinsmith is in this package; the rest calls functions."""

from sqlalchemy import Connection
from sqlalchemy.exc import DatabaseError

from .database import Store, WriteFailed

__all__ = ["Connection", "DatabaseError", "Store", "WriteFailed"]
