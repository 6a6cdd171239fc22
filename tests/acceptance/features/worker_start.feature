Feature: A worker comes up
  From the command to readiness every step can be seen on the machine itself.

  @S42 @S43
  Scenario: Settings, secret, unit, port, first heartbeat, readiness
    When I start a worker "cpu0-c" with 1 slot on "lab1"
    Then the command ends with 0
    And its settings file on "lab1" belongs to root and nobody else may read it
    And the queen heard of "lab1-cpu0-c" while it was loading
    And the record of "lab1-cpu0-c" has an id, a url that answers, its model, backend "cpu" and device 0
    And the fleet token is in no argument list and no unit property on "lab1"

  @S44
  Scenario: The runtime is gone
    Given the runtimes of "lab2" are moved away
    When I start a worker "cpu0-f" with 1 slot on "lab2"
    Then the command ends with 1
    And standard error says "WORKER_BINARY_NOT_FOUND"
    And standard error says "/opt/rbee/runtimes/cpu"
    And standard error says "site.yml"
    And "lab2" has no unit for "cpu0-f"

  @S50
  Scenario: Ready means ready
    When I get "/v1/ready" from the worker "lab1-cpu0"
    Then the answer says ready, idle and that the model is loaded
