Feature: Who is there
  The queen knows workers from what they say themselves, and only as long as they say it.

  @S14
  Scenario: An idle worker gets the request at once
    When I ask "lab2" with "smollm2-135m-instruct" to go on from "Hello"
    Then the command ends with 0
    And no playbook ran

  @S15
  Scenario: A busy machine is not given a second worker behind one's back
    Given all slots of "lab1-cpu0" are taken
    When I ask "lab1" with "smollm2-135m-instruct" to go on from "Hello"
    Then the command ends with 1
    And standard error says "ALL_SLOTS_BUSY"
    And standard error counts 3 more tries
    And no playbook ran
    And "lab1" has the same units as before

  @S47
  Scenario: A restarted queen learns of everybody within one heartbeat
    Given the record of "lab2-cpu0" at the queen
    When the queen is restarted
    Then the record is back within one heartbeat, with the same id, url, model, backend and device
    And the process ids of all workers are unchanged

  @S13
  Scenario: Nobody is there
    Given both hives are stopped
    When I get "/v1/workers" from the queen
    Then the answer is exactly {"workers": []}
    When I ask "lab1" with "smollm2-135m-instruct" to go on from "Hello"
    Then the command ends with 0
    And a playbook ran
    And standard error says "RAM"
