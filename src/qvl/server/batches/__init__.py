"""Files of questions: kept in one folder, answered line by line, resumed after whatever ended the process."""
