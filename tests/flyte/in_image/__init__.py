"""What an image contains of a user's: the tasks of these tests, which every pod finds on its search path."""
