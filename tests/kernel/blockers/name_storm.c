/* Processes with a new name each that fail as fast as one core can make them, until SIGTERM. Prints how many.
 *
 * The child of vfork(2) has the memory of its parent, so its command line is new as well. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile sig_atomic_t over;

static void stop(int signal)
{
	(void)signal;
	over = 1;
}

int main(int argc, char **argv)
{
	unsigned long count = 0, number = 0, names = argc > 2 ? strtoul(argv[2], NULL, 10) : 0;
	char *line = argv[0], name[16], form[16];
	size_t room = strlen(line);

	signal(SIGTERM, stop); /* glibc: interrupted calls are restarted */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	snprintf(form, sizeof(form), "%.7s%%07lx", argc > 1 ? argv[1] : "cnptest");
	while (!over) {
		pid_t pid;

		snprintf(name, sizeof(name), form, number++ & 0xfffffff);
		if (names && number >= names)
			number = 0;
		snprintf(line, room, "%s", name);
		pid = vfork();
		if (pid == 0) {
			prctl(PR_SET_NAME, name);
			_exit(1);
		}
		if (pid > 0 && waitpid(pid, NULL, 0) == pid)
			count++;
	}
	printf("%lu\n", count);
	return 0;
}
