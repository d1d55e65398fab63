/* Processes that fail as fast as one core can make them, until SIGTERM: vfork(2), _exit(1), wait(2). Prints how many. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
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
	unsigned long count = 0;

	signal(SIGTERM, stop); /* glibc: interrupted calls are restarted */
	prctl(PR_SET_NAME, argc > 1 ? argv[1] : "cnptest-storm");
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	while (!over) {
		pid_t pid = vfork();

		if (pid == 0)
			_exit(1);
		if (pid > 0 && waitpid(pid, NULL, 0) == pid)
			count++;
	}
	printf("%lu\n", count);
	return 0;
}
