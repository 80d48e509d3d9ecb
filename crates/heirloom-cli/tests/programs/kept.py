"""An echo server as its author might write it for systemd: socket activation, and connections in the fd store.

It knows nothing of Heirloom, only python3-systemd. Each line is answered with the connection's number, how many lines it has
sent, and the pid. The count is in no store: it shows which connections have met a new process."""
import os
import selectors
import socket
import sys

from systemd import daemon

selector = selectors.DefaultSelector()
connections, next_number = {}, 0


def add(connection, number):
    connection.setblocking(True)
    connections[number] = [connection, 0, b""]
    selector.register(connection, selectors.EVENT_READ, number)


def forget(number):
    connection, _, _ = connections.pop(number)
    selector.unregister(connection)
    daemon.notify(f"FDSTOREREMOVE=1\nFDNAME=client{number}")
    connection.close()


for fd, name in daemon.listen_fds_with_names().items():
    if name == "main":
        listener = socket.socket(fileno=fd)
    else:
        number = int(name.removeprefix("client"))
        add(socket.socket(fileno=fd), number)
        next_number = max(next_number, number + 1)
listener.setblocking(False)
selector.register(listener, selectors.EVENT_READ, None)
print("port", listener.getsockname()[1], "pid", os.getpid(), "restored", len(connections), flush=True)
daemon.notify("READY=1\nSTATUS=serving")
if len(sys.argv) > 1:
    print("argument", sys.argv[1], flush=True)

while True:
    for key, _ in selector.select():
        if key.data is None:
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                continue
            daemon.notify(f"FDSTORE=1\nFDNAME=client{next_number}", fds=[connection.fileno()])
            add(connection, next_number)
            next_number += 1
            continue
        entry = connections[key.data]
        data = entry[0].recv(4096)
        if not data:
            forget(key.data)
            continue
        entry[2] += data
        while b"\n" in entry[2]:
            _, entry[2] = entry[2].split(b"\n", 1)
            entry[1] += 1
            entry[0].sendall(f"{key.data} {entry[1]} {os.getpid()}\n".encode())
