"""A render on ranks as discrete events, from the same timetables."""
