# A program under heirloom-run that does what a test tells it: connects to the test, and runs the lines that come.
import array, json, os, signal, socket, struct, subprocess, sys, time

connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ['PUPPET'])
speaker = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def notify(text, *descriptors):
    beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', descriptors))] if descriptors else []
    text = text if isinstance(text, bytes) else text.encode()
    speaker.sendmsg([text], beside, 0, os.environ['NOTIFY_SOCKET'])


def put(name, *descriptors, more=''):
    notify(f'FDSTORE=1\nFDNAME={name}\n{more}', *descriptors)


def barrier():
    """Waits until everything that was said before is done."""
    ours, theirs = os.pipe()
    notify('BARRIER=1', theirs)
    os.close(theirs)
    assert os.read(ours, 1) == b''
    os.close(ours)


def fetch():
    """All that is stored, as (name, descriptor)."""
    control = socket.socket(socket.AF_UNIX)
    control.connect(os.environ['HEIRLOOM_STORE'])
    control.sendall(b'"Fetch"\n')
    line, rights, _, _ = socket.recv_fds(control, 4096, 4)
    count = json.loads(line)['Fetch']['descriptors']
    channel = socket.socket(fileno=rights[0])
    held = []
    while True:
        packet, descriptors, flags, _ = socket.recv_fds(channel, 65536, 253)
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        if packet == b'.':
            assert channel.recv(1) == b''
            break
        names = packet.decode().split('\n')[:-1]
        assert len(names) == len(descriptors), (len(names), len(descriptors))
        held += zip(names, descriptors)
    assert len(held) == count, (len(held), count)
    return held


given = int(os.environ.get('LISTEN_FDS', '-1'))
lines = connection.makefile('rw')


def say(value):
    lines.write(json.dumps(value) + '\n')
    lines.flush()


say({
    'pid': os.getpid(),
    'given': given,
    'names': os.environ.get('LISTEN_FDNAMES', ''),
    'listen_pid': int(os.environ.get('LISTEN_PID', '-1')),
    'arguments': sys.argv[1:],
})
for line in lines:
    code = json.loads(line)
    try:
        try:
            compiled = compile(code, 'test', 'eval')
        except SyntaxError:
            exec(code, globals())
            say({'ok': None})
        else:
            say({'ok': eval(compiled, globals())})
    except Exception as error:
        say({'error': repr(error)})
os._exit(0)
